"""Train the classifier of 8x8 digits whose features measure small runs (about 10 s on one CPU core).

    python scripts/train_digits_features.py --overwrite

The data are scikit-learn's 1797 digits, as bytes round(v * 255 / 16). Image i is for validation if i % 5 == 0 and for
training otherwise. The same seed, machine and number of threads give the same weights.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from tdq_exp.metrics.features import Digits, FeatureNetwork

OUTPUT = Path(__file__).resolve().parents[1] / "results" / "weights" / "digits_features.safetensors"


def load_split() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Load the digits: training images uint8 [N, 1, 8, 8] and labels [N], then the same for validation."""
    digits = load_digits()
    images = torch.from_numpy(np.round(digits.images * 255 / 16).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    validation = torch.arange(len(images)) % 5 == 0
    return images[~validation], labels[~validation], images[validation], labels[validation]


def main() -> None:
    """Train, report the accuracy on the validation images, and write the weights."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=OUTPUT,
        help="safetensors file to write (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=60,
        help="passes over the training images (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights and order (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    args = parser.parse_args()
    if args.output.exists() and not args.overwrite:
        sys.exit(f"{args.output} exists: add --overwrite to replace it")

    images, labels, validation_images, validation_labels = load_split()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    network = Digits()
    batch_size = 64
    steps = args.epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(args.epochs):
        order = torch.randperm(len(images), generator=generator)
        for chosen in order.split(batch_size)[: len(images) // batch_size]:
            _, logits = network(images[chosen])
            # Smoothing bounds the scale of the features, whose cube enters KID; it also classifies better here.
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    trained = FeatureNetwork(network)
    logits = trained.extract(validation_images.permute(0, 2, 3, 1).numpy(), 64, "cpu")["logits"]
    accuracy = (logits.argmax(dim=1) == validation_labels).double().mean().item()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_bytes(safetensors.torch.save(network.state_dict()))
    print(
        f"validation accuracy {accuracy:.2%}, weights {trained.weights_hash}, written to {args.output}"
    )


if __name__ == "__main__":
    main()
