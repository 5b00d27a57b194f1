"""The machine: processes, progress, tracking, files, environment, pictures; open to any floor."""
