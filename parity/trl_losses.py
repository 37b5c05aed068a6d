"""TRL's own loss on given log-probs: a real `GRPOTrainer`, only its model calls, generation and rewards are replaced.

Both methods that hold the mathematics run as they are: `_generate_and_score_completions` (advantages, masks, weights against
the sampler) and `_compute_loss`. In float64, so that what differs is a formula and not a rounding.
"""

from __future__ import annotations

import tempfile
import warnings

import datasets
import numpy as np
import tokenizers
import torch
import transformers
import trl

__all__ = ["ORIGIN", "VERSIONS", "loss_and_gradient"]

ORIGIN = "trl.GRPOTrainer._generate_and_score_completions and ._compute_loss"
VERSIONS = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
_WORD, _PAD, _END = range(3)
# Set on the trainer after construction: as arguments of the config they would load a reference model or start vLLM.
_LATE = ("beta", "use_vllm")


class _GivenLogprobs(trl.GRPOTrainer):
    """A trainer whose policy, reference, sampler and rewards are arrays."""

    def __init__(self, arrays: dict[str, np.ndarray], rows_cut: tuple[int, ...], group_size: int, options: dict):
        self.given = {name: torch.tensor(array) for name, array in arrays.items()}
        self.given["logprobs"].requires_grad_()
        self.rows_cut = rows_cut
        num_rows = len(arrays["rewards"])
        word_level = tokenizers.models.WordLevel({"word": _WORD, "<pad>": _PAD, "<end>": _END}, unk_token="word")
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(word_level), pad_token="<pad>", eos_token="<end>"
        )
        tiny = dict(vocab_size=3, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
        super().__init__(
            model=transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny, num_key_value_heads=1)),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=trl.GRPOConfig(
                output_dir=tempfile.gettempdir(),
                use_cpu=True,
                bf16=False,
                report_to="none",
                num_generations=group_size,
                per_device_train_batch_size=num_rows,
                num_iterations=2,  # with one, TRL takes π_old = sg(π_θ) and never reads old log-probs
                **{name: value for name, value in options.items() if name not in _LATE},
            ),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["word"] * num_rows}),
            processing_class=tokenizer,
        )
        self.current_gradient_accumulation_steps = 1  # Trainer.train sets it
        self.ref_model = "reference"
        for name in _LATE:
            setattr(self, name, options.get(name, getattr(self, name)))

    def _generate(self, prompts):
        lengths = self.given["mask"].sum(-1).tolist()
        last = [_WORD if row in self.rows_cut else _END for row in range(len(lengths))]
        completions = [[_WORD] * (length - 1) + [end] for length, end in zip(lengths, last, strict=True)]
        sampler = [row[:length].tolist() for row, length in zip(self.given["behavior_logprobs"], lengths, strict=True)]
        texts = ["word"] * len(prompts)
        return [[_WORD]] * len(prompts), completions, None, texts, sampler if self.use_vllm else None, {}, None, None

    def _calculate_rewards(self, *_):
        return self.given["rewards"][:, None]

    def _get_per_token_logps_and_entropies(self, model, *_, compute_entropy=False, **__):
        if compute_entropy:  # the loss
            return self.given["logprobs"], self.given["entropies"], None
        return self.given["reference_logprobs" if model is self.ref_model else "old_logprobs"], None, None


def loss_and_gradient(
    arrays: dict[str, np.ndarray], rows_cut: tuple[int, ...], group_size: int, options: dict
) -> tuple[float, np.ndarray]:
    """TRL's loss and its gradient in the learner's log-probs.

    Args:
      arrays: of `inputs.seeded_inputs`.
      rows_cut: rows whose completion was cut off by the length limit.
      group_size: G.
      options: of `trl.GRPOConfig`.

    Returns:
      (loss, [N, L] gradient).
    """
    torch.set_default_dtype(torch.float64)  # options that become tensors would be float32 otherwise
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = _GivenLogprobs(arrays, rows_cut, group_size, options)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "word"}] * len(arrays["rewards"]))
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), trainer.given["logprobs"].grad.numpy()
