{{- define "pman.name" -}}
{{ .Values.nameOverride | default .Chart.Name | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "pman.fullname" -}}
{{- $name := include "pman.name" . -}}
{{- $joined := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) -}}
{{ .Values.fullnameOverride | default $joined | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "pman.selector" -}}
app.kubernetes.io/name: {{ include "pman.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "pman.metadata" -}}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "pman.selector" . | nindent 2 }}
  app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
  app.kubernetes.io/component: scheduler
  app.kubernetes.io/part-of: chris
  app.kubernetes.io/managed-by: {{ .Release.Service }}
  helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "pman.account" -}}
{{ .Values.serviceAccount.name | default (include "pman.fullname" .) }}
{{- end }}

{{- define "pman.claim" -}}
{{ .Values.storage.existingClaim | default (printf "%s-storebase" .Release.Name) }}
{{- end }}

{{- define "pman.openshift" -}}
{{- if .Capabilities.APIVersions.Has "security.openshift.io/v1/SecurityContextConstraints" }}yes{{ end -}}
{{- end }}

{{- /* User and group of pman's pods as YAML: what was given, else 1001:0, else (on OpenShift) nothing. */ -}}
{{- define "pman.user" -}}
{{- $given := mergeOverwrite (dict) .Values.global.podSecurityContext .Values.podSecurityContext -}}
{{- $usual := empty (include "pman.openshift" .) | ternary (dict "runAsUser" 1001 "runAsGroup" 0) (dict) -}}
{{- mergeOverwrite $usual $given | toYaml -}}
{{- end }}
