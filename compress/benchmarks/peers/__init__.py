"""Other libraries that quantize a trained network, one module each: what this project is compared with.

A module has `INSTALL`, which installs its library, `PACKAGES`, whose versions belong to its figures, and `settings()`.
None is a dependency of the project, so each imports its library late.
"""
