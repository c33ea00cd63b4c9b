"""What a Whisper model is, in the words its graph builders understand."""

from typing import Literal

import msgspec


class WhisperSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of one checkpoint; tensors are called as in Hugging Face's layout. Norms have an epsilon of 1e-5."""

    num_mels: int
    num_frames: int
    """Of the spectrogram that the encoder takes: two for each of its positions."""
    hidden_size: int
    """Of encoder and decoder."""
    num_encoder_layers: int
    num_encoder_heads: int
    encoder_ffn_size: int
    num_decoder_layers: int
    num_decoder_heads: int
    decoder_ffn_size: int
    vocab_size: int
    max_model_len: int
    """Tokens of a window, prompt and result together."""
    activation: Literal["gelu"] = "gelu"

    @property
    def num_positions(self) -> int:
        """What the encoder makes of a window, 20 ms each."""
        return self.num_frames // 2

    @property
    def head_size(self) -> int:
        """Of the decoder."""
        return self.hidden_size // self.num_decoder_heads
