"""Ask a running server about a video: ``python examples/ask_video.py clip.mp4 "What happens here?" [URL]``."""

import sys
from pathlib import Path

from openai import OpenAI

video, question = Path(sys.argv[1]).absolute(), sys.argv[2]
client = OpenAI(base_url=(sys.argv[3:] or ["http://127.0.0.1:30000/v1"])[0], api_key="none")
content = [{"type": "video_url", "video_url": {"url": str(video)}}, {"type": "text", "text": question}]
answer = client.chat.completions.create(model="default", messages=[{"role": "user", "content": content}], temperature=0)
print(answer.choices[0].message.content)
