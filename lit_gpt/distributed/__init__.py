"""More than one device: who started the processes of a run, and how they share a model."""
