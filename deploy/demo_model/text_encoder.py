"""A CLIP text encoder of two layers that reads the attributes of a scene out of a caption.

It is trained alone, before the UNet: from its states at the end of the caption and at every padding
position, a linear layer must tell each attribute. Frozen, it then gives the UNet states in which
"red" always looks the same, whatever the wording.

Only about a hundred of CLIP's 49,408 tokens ever occur. Training keeps rows for those and one row
of zeros for all others; `expand_vocabulary` restores the full table for the checkpoint.
"""

import logging
import random
import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from deploy.demo_model.shapes import ATTRIBUTES, FILLERS, Caption, random_scene, write_caption

log = logging.getLogger(__name__)

CONFIG: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49_408,
    "hidden_size": 48,
    "intermediate_size": 192,
    "projection_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
END_TOKEN = 49_407  # also the padding
UNKNOWN = 0  # the compact row of every token that no caption uses


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """(len(texts), 77) token numbers, padded and cut as SD's pipelines do."""
    encoded = tokenizer(
        list(texts), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    return cast(Tensor, encoded.input_ids)


def used_tokens(tokenizer: CLIPTokenizer) -> list[int]:
    """The tokens that captions are made of, fillers left out."""
    rng = random.Random(0)
    texts = [write_caption(random_scene(rng), rng, filler_chance=0).text for _ in range(10_000)]
    return sorted(set(tokenize(tokenizer, texts).flatten().tolist()))


class CaptionEncoder(nn.Module):
    """The text encoder on a compact vocabulary; maps full token numbers to compact rows."""

    row_of_token: Tensor

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__()
        self.tokens = list(tokens)
        rows = torch.full((CONFIG["vocab_size"],), UNKNOWN)
        rows[self.tokens] = torch.arange(len(self.tokens)) + 1
        self.register_buffer("row_of_token", rows, persistent=False)
        config = CLIPTextConfig(**{**CONFIG, "vocab_size": len(self.tokens) + 1})
        self.model = CLIPTextModel(config)

    def forward(self, token_ids: Tensor) -> Tensor:
        """(batch, 77) full token numbers to (batch, 77, 48) states."""
        return cast(Tensor, self.model(self.row_of_token[token_ids])[0])

    @property
    def token_table(self) -> Tensor:
        return cast(Tensor, self.model.get_input_embeddings().weight)

    @torch.no_grad()
    def forget_unknown(self) -> None:
        self.token_table[UNKNOWN] = 0

    @torch.no_grad()
    def expand_vocabulary(self) -> CLIPTextModel:
        """The same encoder with all 49,408 rows; rows of unknown tokens are zero."""
        full = CLIPTextModel(CLIPTextConfig(**CONFIG))
        state = self.model.state_dict()
        name = next(key for key in state if key.endswith("token_embedding.weight"))
        table = torch.zeros(CONFIG["vocab_size"], CONFIG["hidden_size"])
        table[self.tokens] = state[name][1:]
        full.load_state_dict({**state, name: table})
        return full.eval()


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------


class AttributeHead(nn.Module):
    """Tells each attribute from a state; the class after the last value means "not asked"."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {
                field: nn.Linear(CONFIG["hidden_size"], len(values) + 1)
                for field, values in ATTRIBUTES.items()
            }
        )

    def forward(self, states: Tensor) -> dict[str, Tensor]:
        return {field: layer(states) for field, layer in self.layers.items()}


def attribute_classes(captions: Sequence[Caption]) -> dict[str, Tensor]:
    """For each attribute a (len(captions),) tensor of class numbers."""
    return {
        field: torch.tensor(
            [
                values.index(caption.asked[field]) if field in caption.asked else len(values)
                for caption in captions
            ]
        )
        for field, values in ATTRIBUTES.items()
    }


def _training_captions(count: int, rng: random.Random) -> list[Caption]:
    """One in twelve asks for nothing: it is empty, or made of words that mean nothing here."""
    captions = []
    for _ in range(count):
        if rng.random() < 1 / 12:
            words = rng.sample(FILLERS, rng.choice((0, 0, 1, 3, 6)))
            captions.append(Caption(", ".join(words), {}))
        else:
            captions.append(write_caption(random_scene(rng), rng))
    return captions


def train_text_encoder(
    tokenizer: CLIPTokenizer, seconds: float, batch_size: int = 64
) -> CaptionEncoder:
    """Trains for a wall-clock time; the learning rate falls to zero over it."""
    rng = random.Random(0)
    encoder, head = CaptionEncoder(used_tokens(tokenizer)), AttributeHead()
    nn.init.normal_(encoder.token_table, std=0.3)
    encoder.forget_unknown()
    parameters = [*encoder.parameters(), *head.parameters()]
    peak_rate = 3e-3
    optimizer = torch.optim.AdamW(parameters, lr=peak_rate, betas=(0.9, 0.98), weight_decay=1e-3)
    started, step = time.monotonic(), 0
    while (done := (time.monotonic() - started) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * min(1, (step + 1) / 100) * (1 - done)
        captions = _training_captions(batch_size, rng)
        token_ids = tokenize(tokenizer, [caption.text for caption in captions])
        ended = (token_ids == END_TOKEN).float()
        weights = ended / ended.sum(dim=1, keepdim=True) / batch_size
        loss, right = torch.tensor(0.0), []
        classes = attribute_classes(captions)
        for field, scores in head(encoder(token_ids)).items():
            wanted = classes[field][:, None].expand(-1, 77)
            errors = functional.cross_entropy(scores.transpose(1, 2), wanted, reduction="none")
            loss = loss + (errors * weights).sum()
            right.append((scores.argmax(2) == wanted).float().mul(weights).sum().item())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        encoder.forget_unknown()
        step += 1
        if step % 100 == 0:
            shares = " ".join(f"{share:.3f}" for share in right)
            log.info("text step %d, loss %.4f, right %s", step, loss.item(), shares)
    return encoder.eval()
