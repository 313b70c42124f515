"""
The operator: the part of Pillion that talks to a Kubernetes API server.

The whole of: the webhook that injects the sidecar, and the controller that validates policies and mirrors commits.
Run by: the chart's Deployment, two replicas of one image.
Must never: import torch or `pillion_sidecar`, or do work when it is imported.
"""
