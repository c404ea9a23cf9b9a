"""Co-Reg: train small classifiers on the noisy candidate sets that vision-language models give to unlabelled images."""

__version__ = "0.1.0"
