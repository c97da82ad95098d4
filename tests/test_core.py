"Progress where it can be drawn and where it cannot; jobs in parallel."
import io

import pytest

from agft.core import Progress, parallel_map

class File(list):
    "An error stream that is a file."
    def write(self, text): self.append(text)
    def flush(self): pass
    def isatty(self): return False


@pytest.fixture
def clock(monkeypatch):
    "Time that the test sets."
    now = [0.]
    monkeypatch.setattr('time.monotonic', lambda: now[0])
    return now


def test_in_a_file_progress_is_a_line_now_and_then(monkeypatch, clock):
    stderr = File()
    monkeypatch.setattr('sys.stderr', stderr)
    with Progress('AGFT, seed 0', 400, unit='image') as shown:
        for clock[0] in (14, 16, 17, 32):
            shown.update(100, 'loss 2.5')
    lines = [text for text in stderr if text.strip()]
    assert len(lines) == 2, lines
    assert lines[0].startswith('AGFT, seed 0:  50%') and '200/400' in lines[0] and 'loss 2.5' in lines[0]
    assert '00:16<00:16' in lines[0], 'the time that is left'


def test_the_time_left_of_a_continued_run_is_that_of_its_own_steps(monkeypatch, clock):
    "It goes on at step 10 of 20 and takes 4 s a step."
    stderr = File()
    monkeypatch.setattr('sys.stderr', stderr)
    with Progress('AGFT, seed 0', 20, 10, 'step') as shown:
        for clock[0] in range(4, 44, 4):
            shown.update(1, 'loss 2.5')
    first, second = [text for text in stderr if text.strip()]
    assert '14/20 [00:16<00:24' in first and '18/20 [00:32<00:08' in second


def test_on_a_terminal_progress_is_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self): return True
    stderr = Terminal()
    monkeypatch.setattr('sys.stderr', stderr)
    with Progress('pgd20', 400) as shown:
        shown.update(400)
    assert 'pgd20' in stderr.getvalue() and '\r' in stderr.getvalue()


def test_a_worker_process_draws_no_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self): return True
    monkeypatch.setattr('sys.stderr', Terminal())
    monkeypatch.setenv('AGFT_WORKER', '1')
    assert Progress('pgd20', 400).bar is None


def test_jobs_in_parallel_keep_their_order(monkeypatch):
    jobs = [(2, k) for k in range(6)]
    for threads in (1, 2):
        monkeypatch.setattr('torch.get_num_threads', lambda threads=threads: threads)
        assert parallel_map(pow, jobs, 'cpu') == [1, 2, 4, 8, 16, 32]
