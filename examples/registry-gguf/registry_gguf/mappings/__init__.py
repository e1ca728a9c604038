"""The specs of this package, as YAML files: formats/ and architectures/. The registry reads the files alone."""
