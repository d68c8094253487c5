"""The namespace of the operators in torch: the name of the package, which is another one in a build for the hub."""

NAMESPACE = __name__.partition(".")[0]
