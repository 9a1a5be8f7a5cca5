"""No paper in here: files, options, processes, pictures, kernels."""
