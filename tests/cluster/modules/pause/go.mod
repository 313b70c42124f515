// The process that holds a pod's namespaces, as Kubernetes' own image "pause" does.
module pillion.dev/tests/cluster/pause

go 1.24.0
