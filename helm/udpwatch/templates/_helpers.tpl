{{- define "udpwatch.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "udpwatch.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains (include "udpwatch.name" .) .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "udpwatch.name" .) | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "udpwatch.selectorLabels" -}}
app.kubernetes.io/name: {{ include "udpwatch.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "udpwatch.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "udpwatch.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "udpwatch.image" -}}
{{- with .Values.image }}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ default $.Chart.AppVersion .tag }}{{ end }}
{{- end }}
{{- end }}

{{- define "udpwatch.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}{{ default (include "udpwatch.fullname" .) .Values.serviceAccount.name }}
{{- else }}{{ default "default" .Values.serviceAccount.name }}{{ end }}
{{- end }}

{{- /* dns.address and how much of it is one host's. */}}
{{- define "udpwatch.dnsAddress" -}}
{{ .Values.dns.address }}/{{ ternary "128" "32" (contains ":" .Values.dns.address) }}
{{- end }}

{{- /* On lo it is on every kernel (a dummy interface is a module). Scope host: nothing takes it for a source of its own. */}}
{{- define "udpwatch.putAddress" -}}
[ip, address, replace, {{ include "udpwatch.dnsAddress" . }}, dev, lo, scope, host]
{{- end }}

{{- /* An agent that enters namespaces reads other processes' /proc/PID/ns, which AppArmor's default profiles forbid. */}}
{{- define "udpwatch.appArmorType" -}}
{{- if .Values.appArmorProfile.type }}{{ .Values.appArmorProfile.type }}
{{- else if .Values.capabilities.enterNamespaces }}Unconfined{{ end }}
{{- end }}

{{- /* The field came with 1.30; before, it is an annotation for each container. */}}
{{- define "udpwatch.appArmorByField" -}}
{{- if semverCompare ">=1.30-0" .Capabilities.KubeVersion.Version }}true{{ end }}
{{- end }}

{{- define "udpwatch.appArmorAnnotations" -}}
{{- $type := include "udpwatch.appArmorType" . }}
{{- if and $type (not (include "udpwatch.appArmorByField" .)) }}
{{- $value := get (dict "RuntimeDefault" "runtime/default" "Unconfined" "unconfined" "Localhost" (printf "localhost/%s" .Values.appArmorProfile.localhostProfile)) $type }}
{{- range (ternary (list "udpwatch" "address") (list "udpwatch") .Values.dns.enabled) }}
container.apparmor.security.beta.kubernetes.io/{{ . }}: {{ $value }}
{{- end }}
{{- end }}
{{- end }}

{{- /* What every container here has, beside its capabilities. */}}
{{- define "udpwatch.containerSecurity" -}}
privileged: false
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
# Linux gives a container's capabilities to uid 0 alone: Kubernetes sets no ambient ones (KEP-2763).
runAsUser: 0
runAsGroup: 0
{{- end }}

{{- /* Links of a checkout; Flux's source-controller leaves links out of what it fetches (fluxcd/flux2#4088). */}}
{{- define "udpwatch.noFiles" -}}
{{- fail (printf "%s is missing or empty. It is a link out of the chart, which was lost on the way here: install the package that `helm package helm/udpwatch` makes, it holds the files themselves" .) }}
{{- end }}

{{- /* What JSON Schema cannot say, or not so that one knows what to do. */}}
{{- define "udpwatch.check" -}}
{{- with .Values }}
{{- if and .dns.enabled (not .hostNetwork) }}
{{- fail "dns.enabled needs hostNetwork: true: the responder answers on an address of the node" }}
{{- end }}
{{- if and .dns.enabled (not .dns.clusterDNS) }}
{{- fail "dns.clusterDNS is empty: give the address of the cluster's DNS service, kubectl -n kube-system get service kube-dns -o jsonpath={.spec.clusterIP}" }}
{{- end }}
{{- if and .dns.enabled (eq .dns.clusterDNS .dns.address) }}
{{- fail (printf "dns.clusterDNS and dns.address are both %s: the responder would ask itself" .dns.address) }}
{{- end }}
{{- if and .capabilities.enterNamespaces (not .hostPID) }}
{{- fail "capabilities.enterNamespaces needs hostPID: true: namespaces are found by way of the node's processes" }}
{{- end }}
{{- if and .healDryRun (not (or .heal .healProcesses .healNamespaces)) }}
{{- fail "healDryRun needs servers to heal: give heal, healProcesses or healNamespaces" }}
{{- end }}
{{- if and .podMonitor.enabled .serviceMonitor.enabled }}
{{- fail "podMonitor.enabled and serviceMonitor.enabled: every series would be there twice; choose one" }}
{{- end }}
{{- $labels := include "udpwatch.labels" $ | fromYaml }}
{{- $annotations := merge (include "udpwatch.appArmorAnnotations" $ | fromYaml) (dict "kubectl.kubernetes.io/default-container" "" "checksum/config" "") }}
{{- $folder := ternary (dict .dashboards.folderAnnotation "") dict (ne .dashboards.folder "") }}
{{- include "udpwatch.ownNames" (list "podLabels" .podLabels $labels) }}
{{- include "udpwatch.ownNames" (list "podAnnotations" .podAnnotations $annotations) }}
{{- include "udpwatch.ownNames" (list "podMonitor.labels" .podMonitor.labels $labels) }}
{{- include "udpwatch.ownNames" (list "serviceMonitor.labels" .serviceMonitor.labels $labels) }}
{{- include "udpwatch.ownNames" (list "prometheusRule.labels" .prometheusRule.labels $labels) }}
{{- include "udpwatch.ownNames" (list "dashboards.labels" .dashboards.labels $labels) }}
{{- include "udpwatch.ownNames" (list "dashboards.annotations" .dashboards.annotations $folder) }}
{{- end }}
{{- end }}

{{- /* Takes (value's name, its map, what the chart itself puts beside it): the same name twice is no valid YAML. */}}
{{- define "udpwatch.ownNames" -}}
{{- range $name, $_ := index . 1 }}
{{- if hasKey (index $ 2) $name }}
{{- fail (printf "%s: %s is set by the chart itself" (index $ 0) $name) }}
{{- end }}
{{- end }}
{{- end }}
