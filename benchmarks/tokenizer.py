"""Compare the throughput of our tokenizer and open_clip's on 100,000 varied captions.

    python benchmarks/tokenizer.py

Each tokenizer runs in a process of its own, in batches of 1,000. The cold pass is the first of a
new process and includes construction but not imports; the warm pass is the second over the same
captions. The two alternate for three rounds, and the medians are compared.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
import warnings

from clip_jax.data.tokenizers.clip_bpe import ClipTokenizer

CAPTIONS = 100_000
BATCH = 1_000
ROUNDS = 3
NOT_ASCII = "é ü ñ — – ’ “ ” … ™ ® é° ½ £ € 😀 ❤️ 東京 Москва São Zürich naïve crème".split()  # noqa: SIM905


def captions(count: int, seed: int = 0) -> list[str]:
    """Return captions of 5 to 20 words, drawn from CLIP's vocabulary by a Zipf law, with capitals
    and punctuation as in alt texts. 5% of words are new compounds and 5% numbers; 10% of captions
    are not ASCII and 2% have an HTML entity."""
    rng = random.Random(seed)
    words = [token[:-4] for token in ClipTokenizer().vocab if token.endswith("</w>")]
    words = [word for word in words if word.isascii() and word.isalpha() and len(word) > 1]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    result = []
    for _ in range(count):
        caption = rng.choices(words, weights, k=rng.randrange(5, 21))
        for i in range(len(caption)):
            kind = rng.random()
            if kind < 0.05:
                caption[i] += rng.choice(words)
            elif kind < 0.10:
                caption[i] = str(rng.randrange(10_000))
            elif kind < 0.25:
                caption[i] = caption[i].capitalize()
            elif kind < 0.32:
                caption[i] += rng.choice((",", ".", "!", ":", "'s", ")", " |", " -", "?"))
        if rng.random() < 0.10:
            caption.insert(rng.randrange(len(caption)), rng.choice(NOT_ASCII))
        if rng.random() < 0.02:
            caption.insert(rng.randrange(len(caption)), rng.choice(("&amp;", "&quot;", "&#39;")))
        result.append(" ".join(caption))
    return result


def measure(who: str) -> list[float]:
    """Return the seconds of the cold and the warm pass of one tokenizer in this process."""
    texts = captions(CAPTIONS)
    if who == "open_clip":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from open_clip.tokenizer import SimpleTokenizer
        options = {}
    else:
        SimpleTokenizer = ClipTokenizer
        options = {"truncate": True}  # as open_clip always does
    seconds = []
    start = time.perf_counter()
    tokenizer = SimpleTokenizer()
    for _ in range(2):
        for i in range(0, CAPTIONS, BATCH):
            tokenizer(texts[i : i + BATCH], **options)
        now = time.perf_counter()
        seconds.append(now - start)
        start = now
    return seconds


def main() -> None:
    runs = {"open_clip": [], "clip_jax": []}
    for _ in range(ROUNDS):
        for who, seconds in runs.items():
            command = [sys.executable, "-W", "ignore", __file__, who]
            reply = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            seconds.append(json.loads(reply.splitlines()[-1]))
    rates = {
        who: [CAPTIONS / statistics.median(passes) for passes in zip(*seconds, strict=True)]
        for who, seconds in runs.items()
    }
    print("| captions/s | cold | warm |\n|---|---|---|")
    for who, (cold, warm) in rates.items():
        print(f"| {who} | {cold:,.0f} | {warm:,.0f} |")
    ratios = [
        ours / theirs for ours, theirs in zip(rates["clip_jax"], rates["open_clip"], strict=True)
    ]
    print(f"| ratio | {ratios[0]:.1f} | {ratios[1]:.1f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("who", nargs="?", help=argparse.SUPPRESS)
    who = parser.parse_args().who
    if who:
        print(json.dumps(measure(who)))
    else:
        main()
