"""A transformer that learns a poem letter by letter: a step of one's own, warm-up, clipping, and text drawn from it."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from loopwright import Output, Schedule, Trainer
from loopwright.data import Loader

TEXT = (Path(__file__).parent / "tides.txt").read_text(encoding="utf-8")
LETTERS = sorted(set(TEXT))
LENGTH = 32


class Transformer(nn.Module):
    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.letters = nn.Embedding(len(LETTERS), width)
        self.places = nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(width, len(LETTERS))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        n = text.shape[1]
        x = self.letters(text) + self.places.weight[:n]
        logits: Tensor = self.out(self.layers(x, mask=self.get_buffer("mask")[:n, :n], is_causal=True))
        return logits


def step(model: Transformer, text: Tensor) -> Output:
    logits = model(text[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
    return Output(loss, metrics={"bits": loss.detach() / torch.log(torch.tensor(2.0))})


@torch.no_grad()
def write(model: Transformer, text: str, letters: int) -> str:
    for _ in range(letters):
        seen = torch.tensor([[LETTERS.index(letter) for letter in text[-LENGTH:]]])
        text += LETTERS[int(model(seen)[0, -1].argmax())]
    return text


if __name__ == "__main__":
    torch.manual_seed(0)
    numbers = torch.tensor([LETTERS.index(letter) for letter in TEXT])
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    warm_up = Schedule(LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20)), each="step")
    trainer = Trainer(model, optimizer, step=step, schedule=warm_up, clip_norm=1.0, device="cpu")
    result = trainer.fit(Loader(numbers.unfold(0, LENGTH + 1, 2), batch_size=32, seed=0), epochs=6)
    print(
        f"bits a letter: {result.history[0]['train/bits']:.1f} in epoch 1, {result.history[-1]['train/bits']:.1f} in 6"
    )
    print(write(model.eval(), "The tide ", 36))
