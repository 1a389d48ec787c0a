"""Networks for other runtimes, recorded from their own forward.

No network is described a second time: it runs on arrays without numbers
(:mod:`pvt_ref.export.symbols`), which record the operations. ONNX has single nodes for some
operations (:mod:`pvt_ref.export.twins`). :mod:`pvt_ref.export.onnx_file` writes the file.
"""
