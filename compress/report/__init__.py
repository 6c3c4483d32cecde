"""Finished runs read back and compared, as tables, pictures and one page."""
