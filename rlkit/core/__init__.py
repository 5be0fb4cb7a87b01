"""Pure mathematics of the methods: tensors in, tensors out."""
