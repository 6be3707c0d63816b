"""The SLURM backend without SLURM: tests over executables that say what its commands were measured to say."""
