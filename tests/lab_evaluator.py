"""An evaluator.py with the lab's interface and nothing beyond it, in our own words, for the tests.

Like the lab's it takes no arguments, reads checkpoint.pth from the working directory to the device that the
file names, and wants CUDA.
"""

import torch
from torch import nn
from torchvision import models


class evaluation_model:  # noqa: N801 - the lab's name
    def __init__(self):
        checkpoint = torch.load("./checkpoint.pth")
        self.resnet18 = models.resnet18(weights=None)
        self.resnet18.fc = nn.Sequential(nn.Linear(512, 24), nn.Sigmoid())
        self.resnet18.load_state_dict(checkpoint["model"])
        self.resnet18 = self.resnet18.cuda()
        self.resnet18.eval()
        self.classnum = 24

    def compute_acc(self, out, onehot_labels):
        """As the lab's: hits among the k highest over the number of labels. Says that it was asked."""
        print("the lab's accuracy")
        hits = total = 0
        for scores, label in zip(out, onehot_labels, strict=True):
            k = int(label.sum().item())
            total += k
            _, best = scores.topk(k)
            _, asked = label.topk(k)
            hits += sum(1 for i in best if i in asked)
        return hits / total

    def eval(self, images, labels):
        with torch.no_grad():
            return self.compute_acc(self.resnet18(images), labels)
