"""Networks for other runtimes, written down by the forward that computes them.

No network is described a second time: it runs on arrays without numbers
(:mod:`pvt_ref.export.symbols`), which note what is done to them. For some operations ONNX has a
node of its own (:mod:`pvt_ref.export.twins`). The file is :mod:`pvt_ref.export.onnx_file`.
"""
