"Flags of each image: what they mean, and that a file of them is whole or absent."
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from agft.attack import NORMS, misclassified
from agft.cli import main
from agft.core import AgftError, seeded
from agft.data import load_task
from agft.evaluation import (
    FLAGS,
    Flags,
    evaluate_task,
    evaluate_tasks,
    evaluate_threats,
    read_flags,
    worst_case_flags,
    write_flags,
)
from agft.model import copy_model
from agft.results import Results
from agft.threats import threat
from agft.weights import load_model

EPS = 4/255

@pytest.fixture(scope='module')
def model(): return load_model('agft-tiny')

@pytest.fixture(scope='module')
def task(): return load_task('letters', 20)

def equal(a, b):
    "Whether two flags agree to the bit, types included."
    names = [f.name for f in fields(Flags)]
    pairs = [(getattr(a, name), getattr(b, name)) for name in names]
    return all(u.dtype == v.dtype and u.shape == v.shape and u.tobytes() == v.tobytes() for u, v in pairs)

def some_flags(robust, clean=(1, 1, 1, 1)):
    clean, robust = np.array(clean, bool), np.array(robust, bool)
    n = len(clean)
    return Flags(clean, robust, ~robust & clean, np.full(n, .1, np.float32), np.arange(n), np.array(.25))

BUDGETS = [('pgd20', 'Linf', EPS), ('fgsm', 'Linf', EPS), ('pgd20', 'L2', .5)]

@pytest.mark.parametrize('name,norm,eps', BUDGETS)
def test_flags_are_those_of_an_attack_by_hand(model, task, name, norm, eps):
    t = threat(name, eps, norm)
    flags = evaluate_task(model, task, t, seed=3)
    x, y = task.images/255, task.labels
    head = model.head(task.classes, task.templates)
    def logits_fn(x): return model.logits(x, head)
    correct = ~misclassified(logits_fn, x, y)
    x_adv = t(logits_fn, x[correct], y[correct], seeded(3, task.name, name, 0))
    robust = correct.clone()
    robust[correct] = ~misclassified(logits_fn, x_adv, y[correct])
    distance = torch.zeros(len(x))
    distance[correct] = NORMS[norm].size(x_adv - x[correct])
    expected = Flags(correct.numpy(), robust.numpy(), np.zeros(20, bool), distance.numpy(), y.numpy(),
                     np.array(1/len(task.classes)))
    assert equal(flags, expected)
    assert flags.clean.dtype == flags.robust.dtype == flags.zero_grad.dtype == bool
    assert flags.chance.shape == ()

def test_a_file_holds_the_six_arrays(tmp_path):
    flags = some_flags([1, 0, 0, 1])
    write_flags(tmp_path/'a.npz', flags, {'seed': 0})
    with np.load(tmp_path/'a.npz') as arrays:
        assert arrays.files == [*FLAGS, 'label', 'chance', 'about']
    assert equal(read_flags(tmp_path/'a.npz'), flags) and [f.name for f in tmp_path.iterdir()] == ['a.npz']

@pytest.mark.parametrize('damage', [b'', b'cut off', 'truncated', 'a field is missing'])
def test_a_damaged_file_is_named(tmp_path, damage):
    path, flags = tmp_path/'a.npz', some_flags([1, 0, 0, 1])
    write_flags(path, flags, {'seed': 0})
    if damage == 'truncated':
        damage = path.read_bytes()[:300]
    if damage == 'a field is missing':
        np.savez(path, clean=flags.clean)
    else:
        path.write_bytes(damage)
    with pytest.raises(AgftError, match='remove the file') as e:
        read_flags(path)
    assert str(path) in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('at', range(1, 10))
def test_a_flipped_byte_is_refused_or_has_no_effect(tmp_path, at):
    path, flags = tmp_path/'a.npz', some_flags([1, 0, 0, 1])
    write_flags(path, flags, {'seed': 0})
    held = bytearray(path.read_bytes())
    held[at*len(held)//10] ^= 16
    path.write_bytes(held)
    try:
        found = read_flags(path, {'seed': 0})
    except AgftError as e:
        assert str(path) in str(e)
        return
    assert equal(found, flags)

def brighter(task):
    return replace(task, images=task.images//2 + 64)

def renamed(task):
    return replace(task, classes=tuple(f'big {name}' for name in task.classes))

@pytest.mark.parametrize('change', [brighter, renamed])
def test_flags_of_other_images_or_prompts_are_refused(model, task, tmp_path, change):
    t = threat('fgsm', EPS)
    evaluate_tasks(model, [task], tmp_path, t)
    with pytest.raises(AgftError, match='is of another run, with a different task'):
        evaluate_tasks(model, [change(task)], tmp_path, t)

@pytest.mark.parametrize('change, key', [(dict(seed=1), 'seed'), (dict(batch_size=5), 'batch_size')])
def test_flags_of_another_protocol_are_refused(model, task, tmp_path, change, key):
    t = threat('fgsm', EPS)
    evaluate_tasks(model, [task], tmp_path, t, batch_size=8)
    with pytest.raises(AgftError, match=f'a different {key}'):
        evaluate_tasks(model, [task], tmp_path, t, **(dict(batch_size=8) | change))

def test_flags_and_batches_of_another_model_are_refused(model, task, tmp_path):
    t, other = threat('fgsm', EPS), copy_model(model)
    with torch.no_grad():
        next(other.visual.parameters()).mul_(1.01)
    evaluate_task(model, task, t, batch_size=8, parts=tmp_path/'parts')
    with pytest.raises(AgftError, match='00000.npz is of another run, with a different model'):
        evaluate_task(other, task, t, batch_size=8, parts=tmp_path/'parts')
    evaluate_tasks(model, [task], tmp_path, t)
    with pytest.raises(AgftError, match='a different model'):
        evaluate_tasks(other, [task], tmp_path, t)

def test_two_tasks_of_one_name_are_refused(model, task, tmp_path):
    with pytest.raises(AgftError, match='several tasks are called letters; allowed: every task once'):
        evaluate_tasks(model, [task, brighter(task)], tmp_path, threat('fgsm', EPS))

def test_among_attacks_only_the_images_that_are_left(model, task):
    t, among = threat('fgsm', EPS/4), np.arange(20) % 2 == 0
    everything, half = evaluate_task(model, task, t), evaluate_task(model, task, t, among=among)
    assert np.array_equal(half.clean, everything.clean)
    assert not half.robust[~among].any() and not half.distance[~among].any()
    assert np.array_equal(half.robust[among], everything.robust[among])  # fgsm has no random start

def test_batches_that_are_finished_are_read(model, task, tmp_path):
    t, counts = threat('fgsm', EPS), []
    whole = evaluate_task(model, task, t, batch_size=8, parts=tmp_path, on_batch=counts.append)
    files = sorted(f.name for f in tmp_path.iterdir())
    assert counts == [8, 8, 4] and files == ['00000.npz', '00001.npz', '00002.npz']
    (tmp_path/'00001.npz').unlink()
    def once(*args):
        calls.append(1)
        return t.attack.run(*args)
    calls, watched = [], replace(t, attack=replace(t.attack, run=once))
    assert equal(evaluate_task(model, task, watched, batch_size=8, parts=tmp_path), whole) and len(calls) == 1

def test_the_worst_case_needs_every_attack_to_fail():
    a, b = some_flags([1, 1, 0, 0]), some_flags([1, 0, 1, 0])
    worst = worst_case_flags([a, b])
    assert worst.robust.tolist() == [True, False, False, False]
    assert worst.zero_grad.tolist() == [False, True, True, True]
    assert worst_case_flags([a]) is a and worst.distance is a.distance
    lucky = some_flags([1, 1, 1, 1], clean=[1, 1, 0, 0])  # of a threat that counts the adversarial image
    assert worst_case_flags([lucky, lucky]).robust.tolist() == [True, True, False, False]

def test_threats_of_one_radius_get_a_worst_case(model, task, tmp_path):
    names = [('fgsm', EPS), ('pgd20', EPS/4), ('mifgsm', EPS)]
    threats = [threat(name, eps) for name, eps in names]
    rows = evaluate_threats(model, [task], tmp_path, threats, batch_size=20)
    labels = [t.label for t in threats]
    assert [*rows] == [*labels, 'worst case 4/255']
    worst = worst_case_flags([rows[labels[0]][task.name], rows[labels[2]][task.name]])
    assert equal(rows['worst case 4/255'][task.name], worst)
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(t.key for t in threats)
    silent:Any = copy_model(model)
    silent.features = None  # everything is read; nothing is encoded
    again = evaluate_threats(silent, [task], tmp_path, threats, batch_size=20)
    assert all(equal(again[label][task.name], rows[label][task.name]) for label in rows)

@pytest.mark.parametrize('threats', [[], [threat('fgsm', EPS)]*2])
def test_threats_are_given_once_each(model, task, tmp_path, threats):
    with pytest.raises(AgftError, match='one or more, each once'):
        evaluate_threats(model, [task], tmp_path, threats)

def test_a_task_without_labels_is_named(model, task, tmp_path):
    unlabelled = replace(task, labels=None)
    with pytest.raises(AgftError, match=task.name):
        evaluate_tasks(model, [unlabelled], tmp_path, threat('fgsm', EPS))
    assert not (tmp_path/f'{task.name}.npz').exists()


def test_tasks_evaluated_side_by_side_give_the_same_results(tmp_path):
    words = ['eval', 'agft-tiny', '--tasks', 'digits,texture', '--attacks', 'pgd20', '--eval.images', '8']
    assert main([*words, '--out', str(tmp_path/'one')]) == 0
    assert main([*words, '--out', str(tmp_path/'two'), '--workers', '2']) == 0
    one, two = (Results.load(tmp_path/name/'results.json') for name in ('one', 'two'))
    assert one.accuracy.equals(two.accuracy) and one.about['command'] == two.about['command']


@pytest.mark.parametrize('words', [['--workers', '0'], ['--workers', '-1']])
def test_a_number_of_workers_that_cannot_be_is_refused(tmp_path, capsys, words):
    assert main(['eval', 'agft-tiny', '--tasks', 'digits', *words, '--out', str(tmp_path/'a')]) == 2
    assert 'allowed: 1 or more' in capsys.readouterr().err and not (tmp_path/'a').exists()
