"""The compact trainer: learns a small vision-language model from what Warren selected."""
