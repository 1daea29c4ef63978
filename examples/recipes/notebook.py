# %% [markdown]
# # A run in a notebook
# Jupyter (with jupytext), VS Code and PyCharm open this file as a notebook; it is a script all the same, so that it
# can be tested, compared and run from a shell.

# %%
import torch
from torch import nn

from loopwright import Trainer
from loopwright.callbacks import ProgressBar

torch.manual_seed(0)
x = torch.linspace(-1, 1, 200).unsqueeze(1)
batches = [(x[i::10], x[i::10] ** 2) for i in range(10)]
model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
trainer = Trainer(
    model, torch.optim.Adam(model.parameters(), lr=0.01), nn.MSELoss(), callbacks=[ProgressBar()], device="cpu"
)

# %% [markdown]
# A target is absolute: run the cell as it is a second time, and there is nothing left to do.

# %%
result = trainer.fit(batches, epochs=20)
print(f"{result.progress.epoch} epochs, loss below 0.1: {result.history[-1]['train/loss'] < 0.1}")

# %% [markdown]
# A larger target goes on from there, with the optimizer's state, as one run.

# %%
result = trainer.fit(batches, epochs=60)
print(f"{result.progress.epoch} epochs, loss below 0.01: {result.history[-1]['train/loss'] < 0.01}")

# %%
result.plot("curves.png")  # IPython.display.Image("curves.png") shows it
