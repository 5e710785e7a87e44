"""What can be read out of each layer: linear and attentive probes on frozen features of a labelled folder."""
