"""Read and write models on disk, as safetensors and JSON and never as a pickle.

``atomic``       writes files so that they are complete or absent
``folder``       reads a run's folder without torch
``lock``         lets only one process write into a folder
``lines``        appends JSON objects to a file, one per line
``safetensors``  reads and writes weight files and their headers
``base_options`` records how the base of adapters was loaded
``save``         saves a live model
``export``       copies model folders, converting them if asked
``formats``      names the formats that export offers
``dequantize``   converts quantised folders to plain ones
``merge``        merges adapters into their base and writes the result
``compare``      compares a copy's outputs with the original's
``pickles``      converts pickled weights to safetensors
"""
