"""Who runs the jobs of a sweep: `hydra/launcher=joblib`, `submitit_local`, `submitit_slurm`, `ray`.

They speak Hydra's interface and are not the published plugins, which leave the other jobs running, or lose them, when
the process of one dies.
"""
