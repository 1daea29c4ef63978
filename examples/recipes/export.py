"""Out of the training and into use: the weights as safetensors, and the computation as a torch.export program."""

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loopwright import Trainer, latest_checkpoint, load_weights
from loopwright.callbacks import Checkpoint


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


def train() -> nn.Sequential:
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, nn.MSELoss(), callbacks=[Checkpoint("checkpoints")], device="cpu")
    trainer.fit([(x, x.sum(1, keepdim=True))], epochs=50)
    return model.eval()


def export(model: nn.Module, inputs: Tensor) -> None:
    save_file(model.state_dict(), "weights.safetensors")
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (inputs,), dynamic_shapes=({0: batch},))
    torch.export.save(program, "model.pt2")


if __name__ == "__main__":
    model, inputs = train(), torch.randn(4, 3)
    export(model, inputs)
    more = torch.randn(7, 3)

    again = network()
    again.load_state_dict(load_file("weights.safetensors"))
    print("from weights.safetensors:", torch.equal(again.eval()(more), model(more)))

    program = torch.export.load("model.pt2").module()
    print("from model.pt2, without the class:", torch.allclose(program(more), model(more)))

    if (path := latest_checkpoint("checkpoints")) is not None:
        newest = network()
        load_weights(path, newest)
        print("from a checkpoint:", torch.equal(newest.eval()(more), model(more)))
