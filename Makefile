.PHONY: check lint types test fast goldens

check: lint types test

lint:
	ruff check .
	ruff format --check .

types:
	mypy

test:
	pytest

fast:  ## the tests that take seconds
	pytest -m "not slow"

goldens:  ## make tests/goldens/minilm.json anew
	python tests/goldens/make.py
