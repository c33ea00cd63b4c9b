import numpy as np
import onnx

from sardonyx.runtime.session import open_session
from sardonyx_export.builders.feed import FEED_FILE, build_feed


def test_tokens_come_from_the_host_or_from_what_was_drawn(tmp_path):
    paths = build_feed(tmp_path)
    assert [path.name for path in paths] == [FEED_FILE]
    assert [path.name for path in tmp_path.iterdir()] == [FEED_FILE]
    onnx.checker.check_model(onnx.load(paths[0]), full_check=True)
    session = open_session(paths[0], model_name="feed")
    inputs = {
        "tokens": np.array([5, 6, 7, 8], np.int64),
        "token_ids": np.array([100, 101, 102], np.int64),
        "source": np.array([-1, 2, -1, 0], np.int64),
    }
    assert session.run(inputs)["input_ids"].tolist() == [5, 102, 7, 100]
