"""What decides the next token beside the model: samples, and n-grams that may not come twice.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from transformers import LogitsProcessor, NoRepeatNGramLogitsProcessor


class NoRepeatedNgrams(LogitsProcessor):
    """Lets no n-gram come twice in an answer; what the prompt says may be said again.

    Given to `generate` as a setting, it would count a decoder's prompt, and so forbid a summary the
    words of its text.
    """

    def __init__(self, size: int, width: int) -> None:
        self.processor, self.width = NoRepeatNGramLogitsProcessor(size), width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores of the next tokens [B, V], minus infinity where one would repeat an n-gram."""
        processed: Tensor = self.processor(input_ids[:, self.width :], scores)
        return processed


class RowSampler(LogitsProcessor):
    """Makes the greedy choice a sample: the largest of logit plus Gumbel noise is one.

    `torch.multinomial` over a batch would make a row's sample depend on the rows before it.
    """

    def __init__(
        self,
        prompts: list[list[int]],
        *,
        seed: int,
        temperature: float,
        top_p: float,
        top_k: int,
    ) -> None:
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self.generators = [
            torch.Generator().manual_seed(_row_seed(prompt, seed)) for prompt in prompts
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] whose largest is a sample of the softmax of those given."""
        logits_BV = scores.float() / self.temperature
        vocabulary = logits_BV.shape[-1]
        if 0 < self.top_k < vocabulary:
            least_B1 = logits_BV.topk(self.top_k, dim=-1).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
        if self.top_p < 1:
            sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
            before_BV = sorted_BV.softmax(dim=-1).cumsum(dim=-1) - sorted_BV.softmax(dim=-1)
            beyond_BV = before_BV >= self.top_p  # never the first
            beyond_BV[:, 0] = False
            removed_BV = torch.zeros_like(beyond_BV).scatter(-1, order_BV, beyond_BV)
            logits_BV = logits_BV.masked_fill(removed_BV, -torch.inf)
        tiny = torch.finfo(torch.float32).tiny
        uniform_BV = torch.stack(
            [torch.rand(vocabulary, generator=generator) for generator in self.generators]
        ).clamp_(min=tiny)
        noise_BV = -torch.log(-torch.log(uniform_BV))
        return logits_BV + noise_BV.to(logits_BV.device)


def _row_seed(prompt: list[int], seed: int) -> int:
    content = f"{seed}:{','.join(map(str, prompt))}".encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "little")
