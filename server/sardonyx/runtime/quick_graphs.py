"""Graphs that are sure to be quick, whatever values they are given.

Floor 2. A run of a few microseconds is worth less than the two thread switches around it, so `engine.instances` runs
such models in the thread that asks. That thread is the event loop, so "quick" must be a fact about the graph: its
operators, each of which costs what its inputs' sizes say, and not what is in them.
"""

from pathlib import Path

from sardonyx.errors import ConfigError
from sardonyx.runtime.external_data import GraphReader

MAX_FILE_BYTES = 1 << 20

# None of these makes more elements than it gets, but for broadcasting among inputs of fixed sizes and matrix products.
# Left out are those whose work or output follows from a value: Loop, Scan, If, Range, Expand, Tile, ConstantOfShape,
# NonZero, Pad, Resize, OneHot, random numbers, and everything about strings and sequences.
_ONNX = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh BatchNormalization BitShift BitwiseAnd BitwiseNot
    BitwiseOr BitwiseXor Cast CastLike Ceil Celu Clip Concat Constant Cos Cosh DequantizeLinear Div Dropout
    DynamicQuantizeLinear Elu Equal Erf Exp Flatten Floor Gather GatherElements Gelu Gemm Greater GreaterOrEqual
    HardSigmoid HardSwish Hardmax Identity IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log
    LogSoftmax LpNormalization MatMul MatMulInteger Max Mean MeanVarianceNormalization Min Mish Mod Mul Neg Not
    Or PRelu Pow QLinearMatMul QuantizeLinear Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
    ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Round Selu Shape Shrink
    Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign Split Sqrt Squeeze Sub Sum Tan Tanh
    ThresholdedRelu TopK Transpose Unsqueeze Where Xor
"""
_ONNX_ML = """
    ArrayFeatureExtractor Binarizer Imputer LinearClassifier LinearRegressor Normalizer SVMClassifier
    SVMRegressor Scaler TreeEnsemble TreeEnsembleClassifier TreeEnsembleRegressor
"""
_BOUNDED = frozenset([f":{name}" for name in _ONNX.split()] + [f"ai.onnx.ml:{name}" for name in _ONNX_ML.split()])


def has_bounded_work(path: Path) -> bool:
    """The sizes of a graph's inputs bound its run time, and it is small.

    Args:
        path: of a model file that `check_external_data` has passed.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        return False
    data = path.read_bytes()
    reader = GraphReader(data)
    try:
        if any(reader.message("model", 0, len(data), depth=0)):
            return False  # weights in other files
    except ConfigError:
        return False
    # "ai.onnx" is another spelling of ONNX's own domain.
    return {
        name.removeprefix("ai.onnx") if name.startswith("ai.onnx:") else name for name in reader.operators
    } <= _BOUNDED
