# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
SCALE ?= paper
RUN = $(VENV)/bin/python -m tdq_exp.run

TABLES = table1 table2 table3 table4 table5 table6 table7 table8 table9 table10
FIGURES = figure2 figure3 figure8 figure9 grids layers length encoding

.PHONY: help demo test lint $(TABLES) $(FIGURES) figures claims render rebuilt status report paper verify freeze-rows faults bench bench-cost bench-integer bench-gpu house clean

help:
	@echo "make demo                    set up, then digits W4A4 LSQ+TDQ from float model to picture (minutes, CPU)"
	@echo "make test                    set up, then the fast test suite"
	@echo "make lint                    ruff and mypy"
	@echo "make table1 SCALE=digits     Table 1: run the cells that have no row, render (SCALE: paper, small, digits)"
	@echo "make table2 SCALE=digits     Table 2, post-training quantization, likewise; and so table3 ... table9"
	@echo "make table10 SCALE=small     Table 10, faster step sizes: of this scale alone"
	@echo "                             one column of any: TABLE_ARGS='--column ldm' (or ddim)"
	@echo "make status SCALE=small      every cell: done, running, failed, stale, missing, and the time left"
	@echo "make claims SCALE=small      what the paper's claims come to, from the rows that are there"
	@echo "make render SCALE=small      all tables, figures and claims again, from rows and numbers (a minute)"
	@echo "make rebuilt                 the tables of small and digits again, and refuse any difference"
	@echo "make paper SCALE=small       everything: runs what has no row, in the order of the tables, then renders"
	@echo "make bench-cost              what the lines of Table 7 cost -> results/bench/cost.json"
	@echo "make figure3 SCALE=digits    a figure: measure it if it was not, train what is missing for it, draw"
	@echo "                             (figure2 figure3 figure8 figure9 grids layers length encoding; figures: all of them)"
	@echo "make report                  everything on one page, results/report.html (seconds)"
	@echo "make verify                  checks the checksums of everything under results/ (seconds)"
	@echo "make freeze-rows             lists new rows of results/runs with their commands, which tests compute again"
	@echo "make faults                  damages, kills and misuses tiny runs; counts the outcomes (at most 15 minutes)"
	@echo "make bench                   speed of training and denoising steps -> results/bench/"
	@echo "make bench-integer           a denoising step on integers, simulated, in float and in ONNX Runtime (half an hour)"
	@echo "make bench-gpu               tests and speed that need a GPU -> results/bench/ (eight minutes)"
	@echo "make house                   measures the package: layout, sizes, density of the page"

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet -e '.[test]'
	@touch $@

demo: $(VENV)/installed
	$(RUN) +experiment=digits_fp out=results/demo
	$(RUN) +experiment=digits_w4a4_lsq_tdq out=results/demo

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(TABLES): $(VENV)/installed
	$(VENV)/bin/python -m tdq_exp table $@ --scale $(SCALE) --run $(TABLE_ARGS)

claims status: $(VENV)/installed
	$(VENV)/bin/python -m tdq_exp $@ --scale $(SCALE)

render: $(VENV)/installed
	$(VENV)/bin/python -m tdq_exp render --scale $(SCALE)

# Every committed table and claim again, of rows alone; a difference is shown, and an error. Figures
# are drawn again, too, and not compared: a picture's bytes depend on versions of matplotlib.
rebuilt: $(VENV)/installed
	$(VENV)/bin/python -m tdq_exp render --scale digits > /dev/null
	$(VENV)/bin/python -m tdq_exp render --scale small > /dev/null
	git diff --exit-code -- results/tables
	test -z "$$(git status --porcelain -- results/tables)"

# One table after the other, then the figures, then what they say, on one page. What fails keeps
# nothing from being done after it, unless a signal ended it; the exit code is that of the last.
paper: $(VENV)/installed
	@code=0; \
	go() { \
		echo "$(VENV)/bin/python -m tdq_exp $$*"; \
		$(VENV)/bin/python -m tdq_exp "$$@" || code=$$?; \
		if [ $$code -gt 128 ]; then exit $$code; fi; \
	}; \
	go table all --scale $(SCALE) --run $(TABLE_ARGS); \
	go figure all --scale $(SCALE) --run $(FIGURE_ARGS); \
	go claims --scale $(SCALE); \
	go report; \
	exit $$code

$(FIGURES): $(VENV)/installed
	$(VENV)/bin/python -m tdq_exp figure $@ --scale $(SCALE) --run $(FIGURE_ARGS)

figures: $(VENV)/installed
	$(VENV)/bin/python -m tdq_exp figure all --scale $(SCALE) --run $(FIGURE_ARGS)

report: $(VENV)/installed
	$(VENV)/bin/python -m tdq_exp report

verify: $(VENV)/installed
	$(VENV)/bin/python -m tdq_exp verify results

freeze-rows: $(VENV)/installed
	$(VENV)/bin/python tests/experiment/committed.py

faults: $(VENV)/installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python scripts/faults.py

bench: $(VENV)/installed
	$(VENV)/bin/python scripts/bench/qat.py
	$(VENV)/bin/python scripts/bench/ptq.py

bench-cost: $(VENV)/installed
	$(VENV)/bin/python scripts/bench/cost.py

bench-integer: $(VENV)/installed
	$(VENV)/bin/python scripts/bench/integer.py

bench-gpu: $(VENV)/installed
	scripts/gpu_check.sh $(VENV)/bin/python
	$(VENV)/bin/python scripts/bench/gpu.py --report

house: $(VENV)/installed
	$(VENV)/bin/python scripts/analysis/house.py

clean:
	rm -rf $(VENV) results/demo
