"""Models on disk: safetensors and JSON, never a pickle.

``atomic``       files that are whole or absent
``folder``       a run's folder as far as it can be read without torch
``lock``         one process at a time writes into a folder
``lines``        append-only files of JSON objects
``safetensors``  weight files, their headers and names
``base_options`` how the base of adapters was loaded
``save``         a live model
``export``       copies of folders
``formats``      the forms that export offers
``dequantize``   quantised folders as plain ones
``merge``        adapters merged into their base
``compare``      outputs of a copy beside the original's
``pickles``      pickled weights as safetensors
"""
