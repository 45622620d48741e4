"""The README.md of an exported model: its method, training and measured accuracy."""

from collections.abc import Mapping
from typing import Any

from robustclip.names import markdown
from robustclip.results.protocol import digest
from robustclip.results.run import Run
from robustclip.results.tables import markdown_table

LOADING = {
    "open_clip": 'model = open_clip.create_model("local-dir:THIS_FOLDER")',
    "hf": 'model = transformers.CLIPModel.from_pretrained("THIS_FOLDER")',
}


def model_card(
    method: str, *, to: str, base: str, training: Mapping[str, Any] | None = None, run: Run | None = None
) -> str:
    """Writes the model card in Markdown.

    Args:
        method: name of the method that trained the model.
        to: format of the export, ``open_clip`` or ``hf``.
        base: name of the model before training.
        training: settings of ``robustclip fit``; None if they are unknown.
        run: test of this model; None if there is none.
    """
    facts = {"method": method, "base model": base, **_facts(training)}
    table = "".join(f"| {name} | {markdown(value)} |\n" for name, value in facts.items())
    return f"""# {markdown(method)} on {markdown(base)}

Fine-tuned and exported by robustclip.

| | |
| --- | --- |
{table}
```python
{LOADING[to]}
```

Images are resized to the tower's input (bicubic, without antialiasing) and normalised as the configuration says.

## Results

{_results(run)}"""


def _facts(training: Mapping[str, Any] | None) -> dict[str, str]:
    if training is None:
        return {"training": "not recorded"}
    model = dict(training["model"].get("init_args") or {})
    data = dict(training["data"].get("init_args") or training["data"])
    return {
        "training data": _flat(data.get("train")),
        "training attack": _flat(model.get("attack")),
        "optimiser": _flat(model.get("optimizer")),
        "epochs": str(training.get("trainer", {}).get("max_epochs")),
        "seed": str(training.get("seed_everything")),
    }


def _flat(value: Any) -> str:
    """Formats settings for one cell of a table: ``PGD(eps=1/255, steps=2)``."""
    if isinstance(value, Mapping) and "class_path" in value:
        arguments = (value.get("init_args") or {}).items()
        listed = ", ".join(f"{name}={_flat(argument)}" for name, argument in arguments if argument is not None)
        return f"{value['class_path'].rpartition('.')[2]}({listed})"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_flat(entry)}" for name, entry in value.items() if entry is not None)
    return "none" if value is None else str(value)


def _results(run: Run | None) -> str:
    if run is None:
        return "None were given.\n"
    protocols = {
        task: {attack: protocol["hash"] for attack, protocol in attacks.items()}
        for task, attacks in run.result["protocol"].items()
    }
    return (
        f"Top-1 accuracy in percent with 95 % intervals. Protocol {digest(protocols)}: numbers of another protocol must"
        f" not be compared with these.\n\n{markdown_table(run.result)}"
    )
