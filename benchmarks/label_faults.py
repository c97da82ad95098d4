"""Images whose labels are wrong, or whose classes have a long tail: what `labels.py` trains on.

A module of its own, because functions of a script cannot be sent to other processes if they read torch.
"""
import torch

from agft.core import seeded
from agft.data import Task, load_task

IMBALANCE = 50  # size of the largest class over that of the smallest one, before both are rounded


def training_images(source:str, n:int)->Task: return load_task(source, n, split='train')


def wrong_labels(source:str, n:int, share:float)->Task:
    "A share of the images has the label of another class, drawn at random."
    task = training_images(source, n)
    labels, classes = task.require_labels().clone(), len(task.classes)
    generator = seeded('wrong labels', f'{share}')
    wrong = torch.randperm(len(labels), generator=generator)[:round(share*len(labels))]
    labels[wrong] = (labels[wrong] + torch.randint(1, classes, (len(wrong),), generator=generator)) % classes
    return Task(f'{source}, {share:.0%} wrong', task.images, labels, task.classes, task.templates)


def long_tail(source:str, n:int)->Task:
    "Class sizes fall geometrically; the numbers of the classes are in random order already."
    classes = len(load_task(source, 2).classes)
    share = IMBALANCE**-(torch.arange(classes)/(classes - 1))
    sizes = (n*share/share.sum()).round().long().clamp_min(1)
    task = training_images(source, int(sizes.max())*classes)
    labels = task.require_labels()
    rank = torch.zeros_like(labels)  # how many images of its class come before an image
    for c in range(classes):
        rows = (labels == c).nonzero()[:, 0]
        rank[rows] = torch.arange(len(rows))
    kept = task.choose((rank < sizes[labels]).nonzero()[:, 0])
    return Task(f'{source}, long tail', kept.images, kept.labels, kept.classes, kept.templates)
