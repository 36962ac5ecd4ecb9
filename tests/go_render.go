// Renders a Go template as Ollama does: go run go_render.go < {"template": …, "conversations": [[{role, content}]]}
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

func main() {
	var asked struct {
		Template      string
		Conversations [][]message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(asked.Template))
	told := []string{}
	for _, messages := range asked.Conversations {
		system := []string{}
		pointers := []*message{}
		for i := range messages {
			if messages[i].Role == "system" {
				system = append(system, messages[i].Content)
			}
			pointers = append(pointers, &messages[i])
		}
		var out strings.Builder
		values := map[string]any{"System": strings.Join(system, "\n\n"), "Messages": pointers, "Response": ""}
		if err := parsed.Execute(&out, values); err != nil {
			panic(err)
		}
		told = append(told, out.String())
	}
	json.NewEncoder(os.Stdout).Encode(told)
}
