"""The machine: processes, progress, tracking, files, environment, pictures. Any floor may use it."""
