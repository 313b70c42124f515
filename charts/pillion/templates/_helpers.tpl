{{/* Labels of every object. */}}
{{- define "pillion.labels" -}}
app.kubernetes.io/name: pillion
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Labels that select the pods of a component: dict "root" "component". They never change. */}}
{{- define "pillion.selector" -}}
app.kubernetes.io/name: pillion
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* An image reference: dict "root" "image". */}}
{{- define "pillion.image" -}}
{{ .image.repository }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{/* What both processes read; see operator/src/pillion_operator/settings.py. */}}
{{- define "pillion.env" -}}
- name: PILLION_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- name: PILLION_POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: PILLION_POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- {name: PILLION_LOG_LEVEL, value: {{ .Values.logLevel | quote }}}
- {name: PILLION_SIDECAR_IMAGE, value: {{ include "pillion.image" (dict "root" . "image" .Values.sidecar.image) | quote }}}
- {name: PILLION_IMAGE_PULL_POLICY, value: {{ .Values.sidecar.image.pullPolicy | quote }}}
- {name: PILLION_ALLOWED_IMAGES, value: {{ join "," .Values.sidecar.allowedImages | quote }}}
- {name: PILLION_RUN_AS_USER, value: {{ .Values.sidecar.runAsUser | int64 | quote }}}
- {name: PILLION_RUN_AS_GROUP, value: {{ .Values.sidecar.runAsGroup | int64 | quote }}}
- {name: PILLION_SIDECAR_METRICS_PORT, value: {{ .Values.sidecar.metricsPort | int64 | quote }}}
- {name: PILLION_LIVENESS, value: {{ .Values.sidecar.liveness | quote }}}
- {name: PILLION_FAILURE_POLICY, value: {{ .Values.failurePolicy | quote }}}
- {name: PILLION_TOKEN_AUDIENCE, value: {{ .Values.tokenAudience | quote }}}
- {name: PILLION_HOME_URL, value: "https://pillion-home.{{ .Release.Namespace }}.svc:443"}
{{- with .Values.monitoring }}
{{- if or .jobSeries .serviceMonitor.enabled .prometheusRule.enabled }}
- {name: PILLION_JOB_SERIES, value: "true"}
{{- end }}
{{- end }}
- {name: PILLION_CERTIFICATE_MODE, value: {{ .Values.certificates.mode | quote }}}
- {name: PILLION_SECRET_NAME, value: {{ .Values.certificates.secretName | quote }}}
{{- end }}

{{/* The Deployment of a component: dict "root" "component" "values" "ports" (name: number) "env" (its own variables). */}}
{{- define "pillion.deployment" -}}
{{- $root := .root }}
{{- $selector := include "pillion.selector" . }}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: pillion-{{ .component }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "pillion.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
spec:
  replicas: {{ .values.replicas }}
  revisionHistoryLimit: 3
  selector:
    matchLabels:
      {{- $selector | nindent 6 }}
  strategy:
    {{- if .values.hostNetwork }}
    # The pod uses the node's ports: if each node has a replica, a new one can start only after an old one has ended.
    rollingUpdate: {maxUnavailable: 1, maxSurge: 0}
    {{- else }}
    # A replica ends only when its successor is ready.
    rollingUpdate: {maxUnavailable: 0, maxSurge: 1}
    {{- end }}
  template:
    metadata:
      labels:
        {{- include "pillion.labels" $root | nindent 8 }}
        app.kubernetes.io/component: {{ .component }}
      {{- with .values.podAnnotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      serviceAccountName: pillion-{{ .component }}
      # Variables of Services (PILLION_..._PORT) would meet the operator's own.
      enableServiceLinks: false
      terminationGracePeriodSeconds: 30
      {{- with $root.Values.imagePullSecrets }}
      imagePullSecrets:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $root.Values.priorityClassName }}
      priorityClassName: {{ . }}
      {{- end }}
      {{- if .values.hostNetwork }}
      hostNetwork: true
      dnsPolicy: ClusterFirstWithHostNet
      {{- end }}
      securityContext:
        # No user here: the image sets 65532, and OpenShift gives each namespace its own users.
        runAsNonRoot: true
        seccompProfile: {type: RuntimeDefault}
      containers:
      - name: {{ .component }}
        image: {{ include "pillion.image" (dict "root" $root "image" $root.Values.image) | quote }}
        imagePullPolicy: {{ $root.Values.image.pullPolicy }}
        args: [{{ .component }}]
        env:
          {{- include "pillion.env" $root | nindent 10 }}
          {{- with .env }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
        ports:
        {{- range $name, $number := .ports }}
        - {name: {{ $name }}, containerPort: {{ $number }}}
        {{- end }}
        readinessProbe:
          httpGet: {path: /readyz, port: health}
          periodSeconds: 2
          timeoutSeconds: 5
        livenessProbe:
          httpGet: {path: /healthz, port: health}
          initialDelaySeconds: 30
          periodSeconds: 20
          timeoutSeconds: 10
          failureThreshold: 3
        resources:
          {{- toYaml .values.resources | nindent 10 }}
        securityContext:
          allowPrivilegeEscalation: false
          readOnlyRootFilesystem: true
          capabilities: {drop: [ALL]}
      topologySpreadConstraints:
      - maxSkew: 1
        topologyKey: kubernetes.io/hostname
        whenUnsatisfiable: ScheduleAnyway
        labelSelector:
          matchLabels:
            {{- $selector | nindent 12 }}
      {{- with .values.nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .values.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .values.affinity }}
      affinity:
        {{- toYaml . | nindent 8 }}
      {{- end }}
{{- end }}

{{/* The PodDisruptionBudget of a component: dict "root" "component" "values". */}}
{{- define "pillion.pdb" -}}
{{- if and .root.Values.podDisruptionBudget.enabled (gt (int .values.replicas) 1) -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: pillion-{{ .component }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "pillion.labels" .root | nindent 4 }}
spec:
  minAvailable: 1
  # A replica that is not ready protects nobody, and a node that is drained does not wait for it.
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "pillion.selector" . | nindent 6 }}
{{- end }}
{{- end }}
