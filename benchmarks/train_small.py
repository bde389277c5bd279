"""Trains a small byte-level language model of any family from text files, so that methods can be compared on real weights
of architectures other than SmolLM2's without a download.

    python benchmarks/train_small.py --family gpt_neox --text wiki.txt c4.jsonl --out out/small-gpt-neox --minutes 2

The last tenth of every text is left out of training; perplexity on it is printed. One token is one byte, so perplexities
compare between runs on this model only.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from wandapp.kernels.native import multiplies_bfloat16

SIZES = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
GPT2_SIZES = {"n_embd": 384, "n_inner": 1536, "n_layer": 6, "n_head": 6, "n_positions": 2048}
OPT_SIZES = {
    "hidden_size": 384,
    "ffn_dim": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "word_embed_proj_dim": 384,
}
VOCABULARY = 260


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, three special tokens after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>")


def read_texts(paths: list[str], tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of the first nine tenths of all texts, and of their last tenths."""
    parts: tuple[list[int], list[int]] = ([], [])
    for path in paths:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".jsonl"):
            text = "\n\n".join(json.loads(line)["text"] for line in text.splitlines())
        cut = len(text) * 9 // 10
        for part, piece in zip(parts, (text[:cut], text[cut:]), strict=True):
            part.extend(tokenizer(piece)["input_ids"])
    return torch.tensor(parts[0]), torch.tensor(parts[1])


def build(family: str):
    config = AutoConfig.for_model(family)
    sizes = {"gpt2": GPT2_SIZES, "opt": OPT_SIZES}.get(family, SIZES)
    if hasattr(config, "num_key_value_heads"):
        sizes = sizes | {"num_key_value_heads": 2}
    if hasattr(config, "head_dim"):
        sizes = sizes | {"head_dim": 64}
    special = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, max_position_embeddings=2048, **sizes, **special)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def train(model, ids: torch.Tensor, *, minutes: float, batch: int, seq_len: int, lr: float) -> int:
    """AdamW, warm-up and cosine by time; returns the number of steps."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, betas=(0.9, 0.95))
    start, steps = time.perf_counter(), 0
    while (progress := (time.perf_counter() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (steps + 1) / 100) * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)
        starts = torch.randint(0, len(ids) - seq_len, (batch,))
        tokens = torch.stack([ids[s : s + seq_len] for s in starts]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bfloat16(device)):
            loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        if steps % 200 == 0:
            print(f"step {steps} loss {loss.item():.3f}", flush=True)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--family", default="gpt_neox", help="a transformers model type: gpt_neox, qwen3, gpt2, opt, ..."
    )
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    ids, held_out = read_texts(arguments.text, tokenizer)
    model = build(arguments.family).to("cuda" if torch.cuda.is_available() else "cpu")
    steps = train(
        model, ids, minutes=arguments.minutes, batch=arguments.batch, seq_len=arguments.seq_len, lr=arguments.lr
    )
    model.eval()
    windows = held_out[: len(held_out) // 512 * 512].view(-1, 512)[:64].to(model.device)
    with torch.inference_mode():
        loss = torch.stack([model(input_ids=w[None], labels=w[None]).loss for w in windows]).mean().item()
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(json.dumps({"family": arguments.family, "steps": steps, "held_out_perplexity": round(math.exp(loss), 3)}))


if __name__ == "__main__":
    main()
