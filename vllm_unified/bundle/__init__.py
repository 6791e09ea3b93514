"""The offline bundle: images or wheels, weights and the program in one tar file, for where no cable goes out."""
