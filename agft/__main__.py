from agft.cli import run

run()
