"""Export: the student of a bundle compiled for a runtime, checked against torch, written into the bundle.

python -m distill.export bundles/scenes-sdxl --to onnx
"""
