"""The parser of ``fit``, ``validate`` and ``test``, whose help begins with the most used options."""

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from robustclip.cli.messages import AnsweringParser

DESCRIPTIONS = {
    "fit": "Fine-tune a model.",
    "validate": "Evaluate a model on the validation data.",
    "test": "Evaluate a model on the test data sets, clean and under attack.",
}
MOST_USED = """most used options:
  --config NAME                          configuration of the package, or a file; comes first
  --model CLASS                          method; --model.help CLASS lists its options
  --model.arch A --model.pretrained P    base model: open_clip's names, a folder, or hf-hub:ORG/NAME
  --model.attack.eps 2/255               any argument of the training attack
  --model.optimizer.lr 1e-5              any argument of the optimiser
  --model.defence CLASS                  test-time defence
  --data.root DIR --data.train SET --data.test '[SET, ...]'
  --data.global_batch_size N             images per step of all processes; --data.help CLIPDataModule lists all
  --evaluation.attacks NAME              attacks of a test, such as pgd10 or cascade
  --evaluation.max_samples N             images of each set
  --results.name NAME                    folder below runs/results
  --ckpt_path FILE                       checkpoint to test or to resume
  --trainer.max_epochs N --trainer.devices N --trainer.precision bf16-mixed
"""
OF_TRAINER = "training via flags"  # in the title of Lightning's group of options


class Parser(AnsweringParser, LightningArgumentParser):
    """Lightning's parser, with exits that differ from those of other code."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Shows the most used options first, and those of Lightning's trainer last."""
        self._action_groups = sorted(self._action_groups, key=lambda group: OF_TRAINER in str(group.title))
        text: str = super().format_help(*args, **kwargs)
        if self.description not in DESCRIPTIONS.values():
            return text
        _, _, rest = text.partition(f"{self.description}\n")
        usage = f"usage: {self.prog.replace(' [options]', '')} --config NAME [--KEY VALUE ...]"
        return f"{usage}\n\n{self.description}\n\n{MOST_USED}{rest}"
