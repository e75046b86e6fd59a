# make book   build the website into _build/html
# make serve  serve it at http://localhost:8000
# make test   everything that CI runs
# make clean  remove what the build made (.venv stays)

PYTHON ?= python3
PORT ?= 8000
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: book serve test clean

book: $(INSTALLED)
	$(BIN)/jupyter-book build --quiet .
	@echo
	@echo "The book is in _build/html. Open _build/html/index.html in a browser,"
	@echo "or type 'make serve' and open http://localhost:$(PORT)."

serve: book
	$(BIN)/python -m http.server --directory _build/html $(PORT)

# What fails quickly comes first.
test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/jupyter-book build --quiet --all --warningiserror --keep-going .
	$(BIN)/python -m pytest
	CAPSNB_QUICK=1 $(BIN)/python -m pytest --nbval-lax --nbval-cell-timeout=120 book

$(INSTALLED): requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf _build .pytest_cache .ruff_cache
	find book capsnb tests tools -name __pycache__ -prune -exec rm -rf {} +
