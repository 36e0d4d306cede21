# PYTHON makes the environment; ARGS reaches the command: make test ARGS="tests/kernels -x"
PYTHON ?= python3
BIN := .venv/bin
# The stamp is made last, so an interrupted installation is repeated and a finished one never is.
STAMP := .venv/installed

.PHONY: help demo test bench eval frontier lint clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

demo: $(STAMP)  ## decode with the bundled model
	$(BIN)/dkv demo $(ARGS)

test: $(STAMP)  ## run the tests, two at a time, without the broad ones: these with ARGS="-m slow"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

bench: $(STAMP)  ## measure everything into bench/results: 12 minutes on 2 idle cores
	$(BIN)/dkv bench --all --out bench/results $(ARGS)

eval: $(STAMP)  ## exact answers against speed into bench/results: 15 minutes on 2 idle cores
	$(BIN)/dkv eval --problems 64 --out bench/results/eval $(ARGS)
	$(BIN)/dkv eval --problems 16 --model tiny-dream --out bench/results/eval-dream $(ARGS)
	$(BIN)/dkv eval --problems 32 --run 'cache=none,decode threshold=0.9,0.99' \
		--run 'cache=none,prefix,dual block_length=16 threshold=0.9,0.99' --run 'cache=dual block_length=16' \
		--run cache=decode --out bench/results/eval-parallel $(ARGS)
	$(BIN)/dkv eval --problems 64 --run 'cache=decode refresh=8 threshold=0.99,0.95,0.9' \
		--run 'cache=decode refresh=8 entropy_bound=0.001,0.01,0.1' \
		--run 'cache=decode refresh=8 threshold=0.99 near_threshold=0.9' \
		--run 'cache=dual,skip block_length=16 threshold=0.99' \
		--run 'cache=suffix window=32 block_length=16 threshold=0.99 threshold_decay=0,0.3' \
		--run 'cache=sliding schedule=sliding block_length=16 threshold=0.99' \
		--run 'cache=rollout,elastic threshold=0.99' --run 'cache=rollout,elastic' \
		--run 'cache=suffix window=32 block_length=16' --run 'cache=skip,dual block_length=16' \
		--run 'cache=sliding schedule=sliding block_length=16' --out bench/results/eval-newer $(ARGS)
	$(BIN)/dkv eval --problems 16 --tasks balance --full --out bench/results/eval-full $(ARGS)
	$(BIN)/dkv eval --drift --out bench/results/eval $(ARGS)

# What is compared on answers of 256 slots and more, in blocks of 32.
LONG := --run 'cache=none,decode threshold=0.99' --run 'cache=decode entropy_bound=0.001' \
	--run 'cache=prefix,dual,suffix,skip block_length=32 threshold=0.9995,0.99' \
	--run 'cache=suffix block_length=32 threshold=0.99 threshold_decay=0.3' \
	--run 'cache=dual block_length=32 threshold=0.99 near_threshold=0.9' \
	--run 'cache=prefix,dual block_length=32 entropy_bound=0.001,0.003' \
	--run 'cache=sliding schedule=sliding block_length=32 threshold=0.99' --run 'cache=rollout,elastic threshold=0.99' \
	--run cache=decode --run 'cache=dual,suffix,skip block_length=32' \
	--run 'cache=sliding schedule=sliding block_length=32'

# Characters of prose are seldom sure, hence a lower threshold; and what several slots a step by number cost.
PROSE := --run cache=decode --run 'cache=decode,rollout,elastic threshold=0.9' \
	--run 'cache=dual,suffix,skip block_length=32' --run 'cache=dual,suffix,skip block_length=32 threshold=0.9' \
	--run 'cache=suffix block_length=32 threshold=0.9 threshold_decay=0.4' \
	--run 'cache=dual block_length=32 threshold=0.9 near_threshold=0.7' \
	--run 'cache=dual block_length=32 entropy_bound=0.1' --run 'cache=dual block_length=32 steps=half,quarter' \
	--run 'cache=sliding schedule=sliding block_length=32 threshold=0.9'

frontier: $(STAMP)  ## policies and rules on long answers and on prose into bench/results: 30 minutes on 2 idle cores
	$(BIN)/dkv eval --model tiny-long --problems 32 --seed 2 $(LONG) --out bench/results/eval-long $(ARGS)
	$(BIN)/dkv eval --model tiny-text --problems 16 $(PROSE) --out bench/results/eval-text $(ARGS)

lint: $(STAMP)  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## remove all that is generated, the environment too
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,lint]'
	touch $@
