"""Run a model of timm in a separate process.

python timm_peer.py FOLDER_OF_TIMM MODEL ARGUMENTS_JSON WEIGHTS IMAGES.npy OUT.npz
"""

import json
import sys

import numpy as np
import torch
from bare_timm import timm
from safetensors.torch import load_file

_, name, arguments, weights, images, out = sys.argv[1:]

if name.startswith("local-dir:"):
    model = timm.create_model(name, pretrained=True)
else:
    model = timm.create_model(name, **json.loads(arguments))
    if weights == "random":
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.02)
        torch.save(model.state_dict(), out.replace(".npz", ".pth"))
    else:
        load = load_file if weights.endswith(".safetensors") else torch.load
        model.load_state_dict(load(weights), strict=True)
model.eval()
with torch.no_grad():
    pixels = torch.from_numpy(np.load(images))
    tokens = model.forward_features(pixels)
    logits = model.forward_head(tokens)
    grids = model.forward_intermediates(pixels, norm=True, intermediates_only=True)
np.savez(out, tokens=tokens.numpy(), logits=logits.numpy(), grids=torch.stack(grids).numpy())
