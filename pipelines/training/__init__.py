"""Training runs: a recipe of compose, pretrain, finetune and export, and the folder it makes."""
