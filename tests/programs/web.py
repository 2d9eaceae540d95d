# A web server and its clients, each a process, over TCP: files of every size, and what a client sends comes back.
import hashlib, http.server, os, threading, urllib.request


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, data):
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        n = int(self.path[1:])
        self.answer(bytes((n * k) % 251 for k in range(251)) * (n * 8))

    def do_POST(self):
        self.answer(self.rfile.read(int(self.headers["Content-Length"]))[::-1])

    def log_message(self, *words):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
url = "http://127.0.0.1:%d/" % server.server_port
clients = []
for client in range(3):
    child = os.fork()
    if child == 0:
        server.socket.close()
        total = hashlib.sha256()
        for n in range(120):
            total.update(urllib.request.urlopen(url + str(n * 7 + client)).read())
            total.update(urllib.request.urlopen(url, data=bytes([n, client]) * 5000).read())
        with open(f"client.{client}", "w") as file:
            file.write(total.hexdigest())
        os._exit(0)
    clients.append(child)
threading.Thread(target=server.serve_forever, daemon=True).start()
print([os.waitpid(child, 0)[1] for child in clients], flush=True)
print([open(f"client.{client}").read() for client in range(3)], flush=True)
