"""Sardonyx: a model-repository server over ONNX Runtime."""
