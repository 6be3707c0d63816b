"""A stand-in for Cromwell that runs WDL on a real SLURM; README.md says where it differs from the real one."""
