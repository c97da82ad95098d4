"""Copy the results of a benchmark to where the pages of the book read them.

    python tools/publish.py runs/bench_tiny results/bench_tiny.json
"""
import sys
from pathlib import Path

from agft.results import Results

def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    results = Results.load(source/'results.json' if source.is_dir() else source)
    if not results.about.get('command'):
        sys.exit(f'{source} does not say which command made it')
    results.save(target)
    print(f'{target}: {results.about["command"]}')


if __name__ == '__main__':
    main()
